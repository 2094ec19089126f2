"""What people see of evaluations: pages, rows of CSV, tables in the terminal."""

from efae_jax.report.columns import csv_row, write_csv
from efae_jax.report.comparing import differences, named_apart
from efae_jax.report.page import write_page
from efae_jax.report.records import FILE, FORMAT, check_record, read_record
from efae_jax.report.tables import report_tables

__all__ = [
    "FILE",
    "FORMAT",
    "check_record",
    "csv_row",
    "differences",
    "named_apart",
    "read_record",
    "report_tables",
    "write_csv",
    "write_page",
]
