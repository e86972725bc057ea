"""What the tests' scripts import, imported once; see helpers.py."""
import evaluate  # noqa: F401
import pretrained  # noqa: F401
import sample  # noqa: F401
import torch._dynamo  # noqa: F401: optimizers import it, which takes a second
import train  # noqa: F401
