rule model_card:
    input:
        model=CARD,
        images=IMAGES,
        quality=QUALITY,
        metrics=METRICS,
    output:
        report(
            f"{MODEL}/README.md",
            category="{dataset}",
            labels=report_labels("model card"),
        ),
    log:
        f"{LOGS}/model_card/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.log",
    params:
        model=subpath(input.model, parent=True),
        code=code("model_card", "make_model_card"),
    shell:
        "cdul model-card --model {params.model:q} --data {wildcards.dataset:q} "
        "--images {input.images:q} --quality {input.quality:q} --metrics {input.metrics:q} "
        "--output {output:q} 2> {log:q}"
