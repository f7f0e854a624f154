from sympy._declared import Relational as Relational
