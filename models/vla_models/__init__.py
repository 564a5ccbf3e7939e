"""The policy library: policies, sampling, training, export, runtimes."""
