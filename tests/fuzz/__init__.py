"""Everything that takes bytes from others, fed with whatever a fuzzer makes up.

`targets` are plain functions of bytes that raise for a defect and for nothing else; they know no socket, task or clock.
`python -m tests.fuzz --help` runs them under a coverage-guided fuzzer (atheris: `pip install -e '.[fuzz]'`).
`tests/test_fuzz.py` runs each on what was found, kept in `cases/TARGET/`, and on random input.
"""
