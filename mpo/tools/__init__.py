"""Commands around a run: report, verify, memory plan, download. Run with python -m mpo.tools.NAME."""
