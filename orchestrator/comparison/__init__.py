"""Statistics of a study beyond single cells, as functions of arrays that know nothing of reports."""
