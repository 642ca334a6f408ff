# Not part of `all`: results must not wait for the report, and a new figure must not re-run them.
rule report:
    input:
        rules.all.input,
        reported_files,
    output:
        report(
            directory(below(results.REPORT)),
            patterns=[
                "{page,[^/]+}.html",
                f"{FIGURE_OF}/{{figure,[^/]+}}.svg",
                f"{FIGURE_OF}/{{training,[^/]+}}/{{figure,[^/]+}}.svg",
                f"{FIGURE_OF}/{{training,[^/]+}}/{{figure,[^/]+}}.jpg",
            ],
            caption="../report/figure.rst",
            category=figure_category,
            labels=figure_labels,
        ),
    log:
        f"{LOGS}/report.log",
    params:
        folders=training_folders,
        captions=CAPTIONS,
        page=digest(PACKAGE / "report/page.html"),
        code=code("report", "make_report"),
    shell:
        "cdul report {params.folders:q} --output {output:q} 2> {log:q}"
