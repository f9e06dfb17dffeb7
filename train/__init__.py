"""Where weights come from: one module per stage, in stage order; `python -m train --help` lists them."""
