"""The policy node: hosts any policy on any runtime."""
