"""All checks and measurements that need a GPU, in one command: `make gpu`."""
