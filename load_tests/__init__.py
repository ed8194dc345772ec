"""Load tests: k6 scenarios, the servers that people would otherwise use, and the results."""
