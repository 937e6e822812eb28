"""Settings of `make notebooks`: tutorials run in place, stop at an error, and leave out what differs between runs."""

c = get_config()  # noqa: F821 - nbconvert's
c.NbConvertApp.export_format = "notebook"
c.FilesWriter.build_directory = ""
c.NotebookExporter.preprocessors = [
    "nbconvert.preprocessors.ExecutePreprocessor",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
]
c.NbConvertApp.use_output_suffix = False
c.ExecutePreprocessor.timeout = 1200
c.ExecutePreprocessor.record_timing = False
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}
