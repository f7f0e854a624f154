"""What this project uses of sympy (1.13 and later), which ships no types; `_declared` has the types themselves."""

from sympy._declared import (
    Abs as Abs,
)
from sympy._declared import (
    Add as Add,
)
from sympy._declared import (
    And as And,
)
from sympy._declared import (
    AtomicExpr as AtomicExpr,
)
from sympy._declared import (
    Basic as Basic,
)
from sympy._declared import (
    Eq as Eq,
)
from sympy._declared import (
    Equality as Equality,
)
from sympy._declared import (
    Equivalent as Equivalent,
)
from sympy._declared import (
    Expr as Expr,
)
from sympy._declared import (
    Float as Float,
)
from sympy._declared import (
    Function as Function,
)
from sympy._declared import (
    Ge as Ge,
)
from sympy._declared import (
    GreaterThan as GreaterThan,
)
from sympy._declared import (
    Gt as Gt,
)
from sympy._declared import (
    Integer as Integer,
)
from sympy._declared import (
    Le as Le,
)
from sympy._declared import (
    LessThan as LessThan,
)
from sympy._declared import (
    Lt as Lt,
)
from sympy._declared import (
    Max as Max,
)
from sympy._declared import (
    Min as Min,
)
from sympy._declared import (
    Mul as Mul,
)
from sympy._declared import (
    N as N,
)
from sympy._declared import (
    Ne as Ne,
)
from sympy._declared import (
    Not as Not,
)
from sympy._declared import (
    Number as Number,
)
from sympy._declared import (
    Or as Or,
)
from sympy._declared import (
    Poly as Poly,
)
from sympy._declared import (
    PolynomialError as PolynomialError,
)
from sympy._declared import (
    Pow as Pow,
)
from sympy._declared import (
    Rational as Rational,
)
from sympy._declared import (
    S as S,
)
from sympy._declared import (
    StrictGreaterThan as StrictGreaterThan,
)
from sympy._declared import (
    StrictLessThan as StrictLessThan,
)
from sympy._declared import (
    Symbol as Symbol,
)
from sympy._declared import (
    Unequality as Unequality,
)
from sympy._declared import (
    Xor as Xor,
)
from sympy._declared import (
    ceiling as ceiling,
)
from sympy._declared import (
    expand as expand,
)
from sympy._declared import (
    false as false,
)
from sympy._declared import (
    im as im,
)
from sympy._declared import (
    lambdify as lambdify,
)
from sympy._declared import (
    log as log,
)
from sympy._declared import (
    nsimplify as nsimplify,
)
from sympy._declared import (
    oo as oo,
)
from sympy._declared import (
    preorder_traversal as preorder_traversal,
)
from sympy._declared import (
    re as re,
)
from sympy._declared import (
    symbols as symbols,
)
from sympy._declared import (
    sympify as sympify,
)
from sympy._declared import (
    tanh as tanh,
)
from sympy._declared import (
    to_nnf as to_nnf,
)
from sympy._declared import (
    true as true,
)
