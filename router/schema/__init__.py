"""JSON schemas as grammars can enforce them.

A grammar cannot express all of JSON Schema, and its compiler leaves out without a word what it does not know. So a
schema is brought into a form of which that is not so, and that allows nothing the schema forbids; where there is no
such form, the keyword at fault is named.
"""

from router.schema.budget import MOST_PARTS
from router.schema.enforce import enforceable
from router.schema.errors import SchemaError

__all__ = ["MOST_PARTS", "SchemaError", "enforceable"]
