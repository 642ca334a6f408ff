"""The equations of CDUL as pure functions on arrays: no files, no workflow, no model library."""
