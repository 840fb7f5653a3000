"""`quantkit verify --deep`: what of an artifact can be proven from its source, a sample of modules
at a time.
"""
