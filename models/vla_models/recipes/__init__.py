"""One file for each system of the field; each shows only what is particular to that system."""
