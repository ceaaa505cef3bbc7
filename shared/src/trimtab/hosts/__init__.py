"""The only code that touches the private surface of a framework: one folder for each."""
