from pipelines.shadows import refuse_shadows

refuse_shadows()
