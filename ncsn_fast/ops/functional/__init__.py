"""The public operators, a file each; ``ncsn_fast.ops`` exports them."""
