"""Side-by-side timings of fastlm and the alternatives a user would pick instead: `python -m benchmarks`.

harness.py proves each provider right and then times all of them in turn, machine.py says what machine that was and how
fast it can be at best, report.py writes JSON and tables, pictures.py and page.py draw them, and each bench_<name>.py
lists its cases. A case is added by a function `cases(device)` in such a file: nothing else has to know of it.
"""
