"""``python -m ncsn_fast``: the command ``ncsn-fast``, also for ``torchrun -m ncsn_fast sample ...``."""

from .cli import main

if __name__ == "__main__":
    main()
