# Not part of `all`: results must not wait for their pictures, nor a new picture make them anew.
rule report:
    input:
        rules.all.input,
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
    conda:
        "../../environment.yml"
    params:
        folders=expand(
            TRAINING,
            dataset=RUN.datasets,
            encoder=RUN.encoders,
            labels=RUN.labels,
            training=RUN.trainings,
        ),
        captions=CAPTIONS,
        page=digest(ROOT / "cdul_steps/report/page.html"),
        code=code("report", "make_report"),
    shell:
        "cdul report {params.folders:q} --output {output:q} 2> {log:q}"
