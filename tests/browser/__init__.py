"""The live panel in a real browser: JupyterLab, a kernel, keyboard and mouse."""
