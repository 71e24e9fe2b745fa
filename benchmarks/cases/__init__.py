"""What is measured: one module an operator or part of the work, each with ``cases(settings)``."""
