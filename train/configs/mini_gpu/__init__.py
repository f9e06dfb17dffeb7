"""The recipe of Lens-Mini on one H200: 10-20 minutes in all."""
