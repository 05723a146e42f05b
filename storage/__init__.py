"""The room that keeps the truth: jobs, requests, outputs, passes and workers in one SQL database.

Import from the module that owns the noun (`storage.jobs`, `storage.claims`, `storage.results`, `storage.database`);
this package is empty so that importing one of them costs nothing more.
"""
