from sympy._declared import AppliedUndef as AppliedUndef
