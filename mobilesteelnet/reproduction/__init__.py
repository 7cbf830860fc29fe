"""The paper's tables again: which runs they need, running them, and the page that compares.

``results/`` is made to be committed; ``mobilesteelnet reproduce page`` makes ``RESULTS.md`` of it:

``<recipe>/<network>-seed<seed>.json``   one training and its figures on the test pictures
``recipe/<candidate>.json``              one cross-validation (`reproduce recipe`)
``cost/<network>.json``                  parameters, FLOP and times (`reproduce table6`, `table8`)
``contrast.json``                        the contrasts of the classes (`reproduce table3`)
``robustness.json``                      `robustness RUN --json results/robustness.json`
``notes.json``                           by hand: ``{"table7": {"msff": "why it differs."}}``
"""
