"""Plans of builds: recipe and headers -> every output tensor.

Pure except `sources`, which reads.
"""
