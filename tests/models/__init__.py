"""The models every test and bench uses: seeded random weights, nothing from a hub.

`simple`, `large`, `transformer`, `bert_base` are for everyday use. Three tables, name -> factory,
hold the rest: `DIFFICULT` (what makes serializers stumble), `ARCHITECTURES` (real ones, made tiny)
and `LAYOUTS` (tensors of every dtype and every odd layout). A factory of `LAYOUTS` returns a tensor
or a list of them, every other factory a `Case`. Only the factories that need `transformers` import
it.
"""

from models.architectures import ARCHITECTURES
from models.case import Case, entry
from models.difficult import DIFFICULT
from models.difficult.objects import Pipeline
from models.everyday import Transformer, bert_base, large, simple, transformer
from models.layouts import DTYPES, LAYOUTS

__all__ = [
    "ARCHITECTURES",
    "DIFFICULT",
    "DTYPES",
    "LAYOUTS",
    "Case",
    "Pipeline",
    "Transformer",
    "bert_base",
    "entry",
    "large",
    "simple",
    "transformer",
]
