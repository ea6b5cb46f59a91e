"""The interactive view: one for TensorBoard's tab, the report and a notebook.

``table`` holds the figures of a run as matrices, ``answers`` cuts from them what a screen shows,
``page`` puts both with the front end of ``static`` into one file that needs no network.
"""
