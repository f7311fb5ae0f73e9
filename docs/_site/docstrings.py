"""Three habits of our docstrings, told to the reader that makes the API's pages of them (an extension of griffe)."""

import importlib
import inspect
import re
from typing import Any

import griffe

# Several arguments that share a sentence may take more than one line: "    a, b,\n        c: see elsewhere"
BROKEN_NAMES = re.compile(r"^( {4}\w[\w, ]*,)\n {8}(?=\w[\w, ]*[:,])", re.M)
COMMENT = re.compile(r"#\s*(?P<text>.*\S)")
NAME = re.compile(r"[A-Z_]{2,}(\.\w+)?")


class OurDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            before = None
            while before != obj.docstring.value:
                before = obj.docstring.value
                obj.docstring.value = BROKEN_NAMES.sub(r"\1 ", before)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """A field's comment is its documentation."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class:
            lines = attr.parent.lines_collection[attr.filepath][attr.lineno - 1 : attr.endlineno]
            if found := COMMENT.search(" ".join(lines)):
                attr.docstring = griffe.Docstring(found["text"].rstrip(" )"), lineno=attr.lineno, parent=attr)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Defaults that are constants of a module are shown as what they are, and options by their names."""
        named = [p for p in func.parameters if p.default is not None and NAME.fullmatch(str(p.default))]
        typed = [p for p in func.parameters if "Unpack[" in str(p.annotation)]
        if (named or typed) and func.path.startswith("pear_kernels."):
            found = importlib.import_module(func.module.path)
            for part in func.path.removeprefix(func.module.path + ".").split("."):
                found = getattr(found, part)
            parameters = inspect.signature(found).parameters
            for parameter in named:
                parameter.default = repr(parameters[parameter.name].default)
            # `**keywords` whose names and types stand in a TypedDict; `takes` puts its fields in the signature
            for parameter in [p for p in typed if p.name not in parameters]:
                del func.parameters[parameter.name]
                for name in [n for n in parameters if n not in {p.name for p in func.parameters}]:
                    option = parameters[name]
                    kind = inspect.formatannotation(option.annotation)
                    func.parameters.add(
                        griffe.Parameter(
                            name, annotation=kind, kind=griffe.ParameterKind.keyword_only, default=repr(option.default)
                        )
                    )
