"""The lossd server: losses, targets, the engine that runs them, and the service that offers them."""
