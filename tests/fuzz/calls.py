"""Calls in other spellings: arguments by position or by name, in any order, as operator, function or method, and the signatures that
torch has deprecated. What a spelling means need not be kept: a fuzzed program is its own reference."""

from __future__ import annotations

import ast
import re

from hypothesis import strategies as st

# parameters in torch's order; the first is a method's receiver
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "dropout": ("input", "p", "training", "inplace"),
    "softmax": ("input", "dim", "dtype"),
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "masked_fill_": ("input", "mask", "value"),
    "transpose": ("input", "dim0", "dim1"),
    "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"),
    "unsqueeze": ("input", "dim"),
    "arange": ("start", "end", "step"),
    "full": ("size", "fill_value"),
    "cat": ("tensors", "dim"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "flatten": ("input", "start_dim", "end_dim"),
    "cumsum": ("input", "dim"),
    "diff": ("input", "n", "dim", "prepend"),
    "tanh": ("input",),
    "abs": ("input",),
    "amax": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "mul": ("input", "other"),
    "mul_": ("input", "other"),
    "div": ("input", "other"),
    "div_": ("input", "other"),
    "logical_not": ("input",),
    "bitwise_not": ("input",),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "bitwise_and", "bitwise_or", "bitwise_xor"), ("input", "other")),
}
_ONLY_FUNCTIONS = {"scaled_dot_product_attention", "dropout", "arange", "full", "cat", "where"}
_IN_F = {"scaled_dot_product_attention", "dropout"}
_SHAPED = {"view": "size", "reshape": "shape", "expand": "size"}  # sizes one by one, or as one argument
_OPERATORS: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.MatMult: "matmul",
    ast.BitAnd: "bitwise_and",
    ast.BitOr: "bitwise_or",
    ast.BitXor: "bitwise_xor",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
}
# names that fuzzed programs give to tensors
_TENSORS = re.compile(
    "[qkbhx]|mask|scores|weights?|((raw|flat|old|new)_)?(query|key|value)|keep|documents|positions|runs|noise|bias|extra|slopes?|sinks|start|out"
)
_MODULES = {"torch", "F"}
VARIANTS = 16


def respell(draw, source: str) -> str:
    """The program with some of its calls spelled in another way; the first choice is the program as it is."""
    places = draw(st.one_of(st.just(set()), st.just(set()), st.sets(st.integers(0, 79), min_size=1, max_size=10)))
    if not places:
        return source
    tree = ast.parse(source)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name in ("masks", "attend"):
            _Respeller(draw, places, function.name).visit(function)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class _Respeller(ast.NodeTransformer):
    def __init__(self, draw, places: set[int], function: str):
        self.draw, self.places = draw, places
        self.count = 0 if function == "masks" else 20

    def chosen(self) -> int | None:
        """The variant of the next call, or None where it stays as it is."""
        self.count += 1
        return self.draw(st.integers(0, VARIANTS - 1)) if self.count - 1 in self.places else None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        name, receiver = node.func.attr, node.func.value
        function = isinstance(receiver, ast.Name) and receiver.id in _MODULES
        if name in _SHAPED and not function and node.args:
            variant = self.chosen()
            return node if variant is None else _shaped(name, receiver, node.args, variant)
        if name not in _SIGNATURES or any(isinstance(a, ast.Starred) for a in node.args):
            return node
        arguments = node.args if function else [receiver, *node.args]
        parameters = _SIGNATURES[name]
        if name == "arange" and len(arguments) == 1:
            parameters = ("end",)
        if len(arguments) > len(parameters):
            return node
        given = dict(zip(parameters, arguments, strict=False)) | {k.arg: k.value for k in node.keywords}
        if not function and name not in _ONLY_FUNCTIONS and not name.endswith("_") and "_" not in name and not is_tensor(receiver):
            return node
        variant = self.chosen()
        return node if variant is None else _spelled(name, given, variant)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self.operator(node, type(node.op), node.left, node.right)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        return self.operator(node, type(node.ops[0]), node.left, node.comparators[0])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Invert) or not is_tensor(node.operand):
            return node
        variant = self.chosen()
        if variant is None:
            return node
        return _spelled("logical_not" if variant % 3 else "bitwise_not", {"input": node.operand}, variant)

    def operator(self, node: ast.AST, kind: type, left: ast.expr, right: ast.expr) -> ast.AST:
        if kind not in _OPERATORS or not is_tensor(left):
            return node
        variant = self.chosen()
        return node if variant is None else _spelled(_OPERATORS[kind], {"input": left, "other": right}, variant)


def is_tensor(node: ast.AST) -> bool:
    """Whether an expression of a fuzzed program is known to be a tensor."""
    if isinstance(node, ast.Name):
        return _TENSORS.fullmatch(node.id) is not None
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        return is_tensor(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        module = isinstance(node.func.value, ast.Name) and node.func.value.id in _MODULES
        return (module and node.func.attr != "finfo") or is_tensor(node.func.value)
    if isinstance(node, ast.BinOp):
        return is_tensor(node.left) or is_tensor(node.right)
    if isinstance(node, ast.Compare):
        return is_tensor(node.left)
    return isinstance(node, ast.UnaryOp) and is_tensor(node.operand)


def _spelled(name: str, given: dict[str, ast.expr], variant: int) -> ast.Call:
    """The call with so many arguments by position; the variant counts styles, positions and orders of the keywords."""
    method = name not in _ONLY_FUNCTIONS and (variant % 2 == 0 or name.endswith("_"))
    only_by_name = [n for n in given if n not in _SIGNATURES[name]]
    ordered = [n for n in _SIGNATURES[name] if n in given]
    whole_prefix = [n for n, m in zip(ordered, _SIGNATURES[name], strict=False) if n == m] if name != "arange" else ordered
    if name == "arange" and "start" in given and "step" not in given and variant % 3 == 0:
        given, ordered = given | {"step": ast.Constant(1)}, [*ordered, "step"]
    by_position = min((variant // 2) % (len(ordered) + 1), len(whole_prefix))
    if name == "arange" and "start" not in given:
        by_position = min(by_position, 1)
    first = 1 if method else 0
    positional = [given[n] for n in ordered[first : max(by_position, first)]]
    rest = [*ordered[max(by_position, first) :], *only_by_name]
    if variant >= VARIANTS // 2:
        rest.reverse()
    keywords = [ast.keyword(n, given[n]) for n in rest]
    if name in ("add", "sub") and variant >= VARIANTS - 3:
        return _scaled_sum(name, given, variant, method)
    owner = given[ordered[0]] if method else ast.Name("F" if name in _IN_F else "torch", ast.Load())
    return ast.Call(ast.Attribute(owner, name, ast.Load()), positional, keywords)


def _scaled_sum(name: str, given: dict[str, ast.expr], variant: int, method: bool) -> ast.Call:
    """input + alpha * other, by name or in the deprecated order (alpha before other)."""
    owner = given["input"] if method else ast.Name("torch", ast.Load())
    before = [] if method else [given["input"]]
    target = ast.Attribute(owner, name, ast.Load())
    if variant == VARIANTS - 1 and is_tensor(given["other"]):
        return ast.Call(target, [*before, ast.Constant(2), given["other"]], [])
    return ast.Call(target, [*before, given["other"]], [ast.keyword("alpha", ast.Constant(1 + variant % 2))])


def _shaped(name: str, receiver: ast.expr, sizes: list[ast.expr], variant: int) -> ast.Call:
    whole = sizes[0] if len(sizes) == 1 else ast.Tuple(sizes, ast.Load())
    if name == "reshape" and variant % 3 == 0:
        target, shape = ast.Attribute(ast.Name("torch", ast.Load()), name, ast.Load()), ast.keyword("shape", whole)
        return ast.Call(target, [receiver], [shape]) if variant % 2 else ast.Call(target, [], [ast.keyword("input", receiver), shape])
    target = ast.Attribute(receiver, name, ast.Load())
    return ast.Call(target, [], [ast.keyword(_SHAPED[name], whole)]) if variant % 2 else ast.Call(target, [whole], [])
