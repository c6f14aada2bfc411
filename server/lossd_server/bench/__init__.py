"""`lossd bench`: what losses, assigner and transports take, side by side in one run, and under load."""
