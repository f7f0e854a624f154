from sympy._declared import Boolean as Boolean
from sympy._declared import BooleanAtom as BooleanAtom
from sympy._declared import BooleanFunction as BooleanFunction
