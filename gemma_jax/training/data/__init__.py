"""Data for training: files of examples become batches of one shape.

`settings` says what is read and how; `files` and `examples` read rows; `documents` makes token ids
of them and says which are trained; `packing` puts several into a row; `assemble` makes the arrays;
`survey` reads everything once before a run, `pipeline` gives the batches, `statistics` counts.
"""
