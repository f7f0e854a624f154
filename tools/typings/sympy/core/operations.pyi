from sympy._declared import LatticeOp as LatticeOp
