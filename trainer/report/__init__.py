"""The run report: one offline HTML page written from what a run left in its folder, and the live panel of a run that is going on.

``tail`` reads the lines, ``state`` how the run stands, ``reading`` a whole folder as it is, also after a crash, into a
``record``; ``summary`` pairs evaluations; ``progress`` follows the lines of a run that is going on; ``outcome`` turns the
numbers into before/after rows and comparisons, ``troubles`` says what went wrong; ``wording`` spells them; ``charts``
says what each figure shows; ``figures`` draws a figure as themed SVG; ``page`` puts them together (``write_report``).
Only ``figures`` (and with it ``charts`` and ``page``) needs matplotlib, only ``page`` needs jinja2.
"""
