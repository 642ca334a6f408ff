rule model_card:
    input:
        model=f"{TRAINING}/model/model.json",
        images=IMAGES,
        quality=f"{LABELS}/quality.json",
        metrics=f"{TRAINING}/metrics.json",
    output:
        f"{TRAINING}/model/README.md",
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
