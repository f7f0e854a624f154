from sympy._declared import AtomicExpr as AtomicExpr
from sympy._declared import Expr as Expr
