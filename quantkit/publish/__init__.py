"""From a finished artifact to those who serve it: checked, signed, published, pulled."""
