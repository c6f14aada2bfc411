"""What tests of the losses share."""


def evaluated(loss, arguments, options):
    """Checks and evaluates, as every caller does."""
    return loss.evaluate(loss.prepare(arguments), options)
