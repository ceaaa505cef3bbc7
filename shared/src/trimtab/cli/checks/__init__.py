"""What ``trimtab doctor`` looks at: a module for each subject, a function for each check.

A check returns its findings and never raises for what it finds. No check imports a framework into
this process; what must be imported is imported by another one.
"""
