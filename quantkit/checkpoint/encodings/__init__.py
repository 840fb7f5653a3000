"""Source encodings: how a checkpoint stores weights in codes. The file name is the registration."""
