"What a module offers to its users, read from the text of its code: names, signatures, docments. Nothing is imported or run."
import ast
import io
import tokenize
from dataclasses import dataclass
from inspect import cleandoc

@dataclass
class Row:
    "A line of a table: a parameter, a field, or what is returned."
    name: str
    kind: str = ''     # the annotation
    default: str = ''
    comment: str = ''

@dataclass
class Entry:
    "A public function, class, method or constant."
    sort: str          # as Sphinx calls it: function, class, method, classmethod, staticmethod, property, data
    name: str
    signature: str     # '(scores, epsilon=0.05)'; the value of a constant
    text: str          # its docstring or comment
    rows: list[Row]
    returns: Row | None
    bases: list[str]
    members: list['Entry']

class Comments:
    "The comments of one piece of code, by line."
    def __init__(self, code: str):
        self.after, self.alone = {}, {}  # behind code, and on a line of their own
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type != tokenize.COMMENT: continue
            place = self.alone if token.line[:token.start[1]].strip() == '' else self.after
            place[token.start[0]] = token.string.lstrip('# ').strip()

    def of(self, first: int, last: int) -> str:
        "The comment behind the last line, else the lines of comment right above the first."
        if last in self.after: return self.after[last]
        above = []
        while (first := first - 1) in self.alone: above.insert(0, self.alone[first])
        return ' '.join(above)

def public(name: str) -> bool: return not name.startswith('_')

def text_of(node: ast.AST | None) -> str: return '' if node is None else ast.unparse(node)

def parameters(function: ast.FunctionDef, comments: Comments) -> list[Row]:
    "One row a parameter, `self` and `cls` left out."
    given = function.args
    plain = given.posonlyargs + given.args
    pairs = list(zip(plain, [None]*(len(plain) - len(given.defaults)) + given.defaults))
    pairs += [(given.vararg, None)]*bool(given.vararg) + list(zip(given.kwonlyargs, given.kw_defaults)) + [(given.kwarg, None)]*bool(given.kwarg)
    stars = {given.vararg: '*', given.kwarg: '**'}
    several = function.end_lineno > function.lineno and len({argument.lineno for argument, _ in pairs}) == len(pairs)  # a line for each
    rows = []
    for argument, default in pairs:
        if argument.arg in ('self', 'cls'): continue
        comment = comments.of(argument.lineno, (default or argument).end_lineno) if several and argument.lineno > function.lineno else ''
        rows.append(Row(stars.get(argument, '') + argument.arg, text_of(argument.annotation), text_of(default), comment))
    return rows

def function_entry(function: ast.FunctionDef, comments: Comments, sort: str = 'function') -> Entry:
    rows, names = parameters(function, comments), []
    for decorator in map(text_of, function.decorator_list):
        if sort == 'method' and decorator in ('property', 'cached_property', 'classmethod', 'staticmethod'): sort = decorator.removeprefix('cached_')
    for number, row in enumerate(rows):
        if number == len(function.args.posonlyargs + function.args.args) - (sort in ('method', 'classmethod')) and function.args.kwonlyargs and not function.args.vararg:
            names.append('*')
        names.append(row.name + (f'={row.default}' if row.default else ''))
    returned = function.returns and Row('returns', text_of(function.returns), '', comments.after.get(function.returns.end_lineno, ''))
    if returned and returned.kind == 'None' and not returned.comment: returned = None
    signature = '' if sort == 'property' else f'({", ".join(names)})'
    return Entry(sort, function.name, signature, cleandoc(ast.get_docstring(function) or ''), rows, returned, [], [])

def class_entry(node: ast.ClassDef, comments: Comments) -> Entry:
    "A class with what it is made from: the parameters of `__init__`, or the fields of a dataclass (or named tuple)."
    methods = [function_entry(part, comments, 'method') for part in node.body if isinstance(part, ast.FunctionDef)]
    made = next((entry for entry in methods if entry.name == '__init__'), None)
    fields = [Row(part.target.id, text_of(part.annotation), text_of(part.value), comments.of(part.lineno, part.end_lineno))
              for part in node.body if isinstance(part, ast.AnnAssign) and public(part.target.id)]
    rows = made.rows if made else fields
    signature = made.signature if made else f'({", ".join(row.name + (f"={row.default}" if row.default else "") for row in fields)})' if fields else ''
    return Entry('class', node.name, signature, cleandoc(ast.get_docstring(node) or ''), rows, None,
                 [text_of(base) for base in node.bases], [entry for entry in methods if public(entry.name)])

def entries(code: str) -> list[Entry]:
    "Everything public that a piece of code defines, in its order."
    found, comments = [], Comments(code)
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef): found.append(function_entry(node, comments))
        elif isinstance(node, ast.ClassDef): found.append(class_entry(node, comments))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            value, comment = text_of(node.value), comments.of(node.lineno, node.end_lineno)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                found += [Entry('data', name.id, value, comment, [], None, [], []) for name in names if isinstance(name, ast.Name)]
    return [entry for entry in found if public(entry.name)]
