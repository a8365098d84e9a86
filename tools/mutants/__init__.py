"""Mutation testing: how many small faults in `trainer/` the fast tests detect.

Why this is not mutmut 3.8 or cosmic-ray 8.7: cosmic-ray starts a process for each mutant, and importing torch,
transformers and DeepSpeed takes 5 to 8 s of CPU, so 400 mutants take an hour of imports alone. mutmut forks, but it
leaves out every decorated function (all rules of the configuration, all properties, all context managers) and all code
outside functions, and it does not sample. Here a process that has imported everything but this repository forks a child
for each mutant; the child imports the repository, with one module mutated, and runs the fast tests that execute the
mutated line.
"""
