rule model_card:
    input:
        model=CARD,
        images=IMAGES,
        quality=QUALITY,
        metrics=METRICS,
    output:
        f"{MODEL}/README.md",
    log:
        f"{LOGS}/model_card/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.log",
    conda:
        "../../environment.yml"
    params:
        model=subpath(input.model, parent=True),
        code=code("model_card", "make_model_card"),
    shell:
        "cdul model-card --model {params.model:q} --data {wildcards.dataset:q} "
        "--images {input.images:q} --quality {input.quality:q} --metrics {input.metrics:q} "
        "--output {output:q} 2> {log:q}"
