"""Writes a class of this package, and all of the package that it needs, as one module.

Top-level definitions are followed from the class by the names that they mention, from module to module along imports
within the package, and copied with their comments in the order in which Python would have run them.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec, resolve_name
from pathlib import Path


def bundled_source(module: str, name: str, without_bases: Collection[str] = ()) -> str:
    """One definition, and whatever it needs of its package, as the source of one module.

    Comments and docstrings are kept, but for those of modules.

    Args:
        module: Full name of a module that is part of a package.
        name: What it defines at its top level.
        without_bases: Names of base classes that are left out, with whatever only they need.

    Returns:
        Imports from outside the package, then definitions.

    Raises:
        ValueError: If the needed modules cannot be one: two meanings of one name, an import from within the package
            inside a function or of a whole module, or a statement at their top level that is neither an import nor a
            definition of a name.
    """
    bundle = _Bundle(without_bases)
    bundle.add_required(module, name)
    return bundle.source()


@dataclass(frozen=True)
class _Definition:
    module: str
    line: int
    name: str
    uses: frozenset[str]
    source: str


class _Bundle:
    """Definitions that need each other, and what they import."""

    def __init__(self, without_bases: Collection[str]):
        self._without_bases = without_bases
        self._modules: dict[str, _Module] = {}
        self._definitions: set[_Definition] = set()
        # What every name stands for, which must be one thing: an import statement, or the source of a definition.
        self._meanings: dict[str, str] = {}

    def add(self, module_name: str, name: str) -> None:
        """Add what a name means in a module, if it means anything there, and all that this needs."""
        module = self._module(module_name)
        if name in module.imports:
            self._mean(name, module.imports[name], module_name)
        elif name in module.links:
            self.add_required(module.links[name], name)
        elif name in module.definitions and module.definitions[name] not in self._definitions:
            definition = module.definitions[name]
            self._definitions.add(definition)
            self._mean(name, definition.source, module_name)
            for used in sorted(definition.uses):
                self.add(module_name, used)

    def add_required(self, module_name: str, name: str) -> None:
        """Add what a name means in a module, where it must mean something."""
        if not self._module(module_name).has(name):
            raise ValueError(f"`{module_name}` has no `{name}` at its top level.")
        self.add(module_name, name)

    def source(self) -> str:
        """The module."""
        position = {name: place for place, name in enumerate(self._modules_in_order())}
        ordered = sorted(self._definitions, key=lambda item: (position[item.module], item.line))
        # Equal definitions of two modules are one.
        sources = list(dict.fromkeys(item.source for item in ordered))
        imports = sorted({text for text in self._meanings.values() if text not in sources})
        return "\n".join(imports) + "".join(f"\n\n\n{source}" for source in sources) + "\n"

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module(name, self._without_bases)
        return self._modules[name]

    def _mean(self, name: str, meaning: str, module: str) -> None:
        if self._meanings.setdefault(name, meaning) != meaning:
            raise ValueError(f"`{name}` of {module} means something else in another module that is needed with it.")

    def _modules_in_order(self) -> list[str]:
        """Every module after those that it imports from."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            for imported in self._modules[name].links.values():
                if imported in self._modules and imported not in order:
                    visit(imported)
            order[name] = None

        for name in self._modules:
            visit(name)
        return list(order)


class _Module:
    """The top level of one module of the package, read but not run.

    Attributes:
        imports: By name, the statement that imports it from outside the package.
        links: By name, the module of the package that it is imported from.
        definitions: By name.
    """

    def __init__(self, name: str, without_bases: Collection[str]):
        spec = find_spec(name)
        self.imports: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.definitions: dict[str, _Definition] = {}
        self._name, self._package = name, spec.parent
        self._without_bases = without_bases
        text = Path(spec.origin).read_text(encoding="utf-8")
        self._lines = text.splitlines()
        end = 0
        for statement in ast.parse(text).body:
            self._read(statement, end)
            end = statement.end_lineno

    def has(self, name: str) -> bool:
        """Whether the name means anything here, other than to Python itself."""
        return name in self.imports or name in self.links or name in self.definitions

    def _read(self, statement: ast.stmt, previous_end: int) -> None:
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__"):
                pass
            case ast.Import() | ast.ImportFrom():
                self._read_import(statement)
            case (
                ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Assign(targets=[ast.Name(id=name)])
                | ast.AnnAssign(target=ast.Name(id=name))
            ):
                self._read_definition(statement, name, previous_end)
            case _:
                raise self._refusal(statement, "is neither an import nor a definition of one name")

    def _read_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        module = self._imported_module(statement)
        for alias in statement.names:
            # `import a.b` binds `a`.
            name = alias.asname or alias.name.partition(".")[0]
            if not self._is_within(module or alias.name):
                one = ast.Import([alias]) if module is None else ast.ImportFrom(module, [alias], 0)
                self.imports[name] = ast.unparse(one)
            elif module is None or name != alias.name:
                raise self._refusal(statement, "does not import a name of the package as it is")
            else:
                self.links[name] = module

    def _read_definition(self, statement: ast.stmt, name: str, previous_end: int) -> None:
        bases = getattr(statement, "bases", [])
        kept = [base for base in bases if not (isinstance(base, ast.Name) and base.id in self._without_bases)]
        lines = self._lines[previous_end : statement.end_lineno]
        if len(kept) < len(bases):
            header = f"class {name}({', '.join(map(ast.unparse, [*kept, *statement.keywords]))}):".replace("()", "")
            lines[statement.lineno - 1 - previous_end : statement.body[0].lineno - 1 - previous_end] = [header]
            statement.bases = kept
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and self._imports_the_package(node):
                raise self._refusal(node, "imports from the package inside a definition")
        uses = frozenset(node.id for node in ast.walk(statement) if isinstance(node, ast.Name)) - {name}
        source = "\n".join(lines).strip("\n")
        self.definitions[name] = _Definition(self._name, statement.lineno, name, uses, source)

    def _imported_module(self, statement: ast.Import | ast.ImportFrom) -> str | None:
        if isinstance(statement, ast.Import):
            return None
        return resolve_name("." * statement.level + (statement.module or ""), self._package)

    def _imports_the_package(self, statement: ast.Import | ast.ImportFrom) -> bool:
        module = self._imported_module(statement)
        return any(self._is_within(module or alias.name) for alias in statement.names)

    def _is_within(self, module: str) -> bool:
        return module.partition(".")[0] == self._name.partition(".")[0]

    def _refusal(self, statement: ast.stmt, reason: str) -> ValueError:
        line = self._lines[statement.lineno - 1].strip()
        return ValueError(f"{self._name} cannot be copied: line {statement.lineno}, `{line}`, {reason}.")
