{{/* What autoscalers go by. */}}

{{/* In PromQL, of this release's pods. The wait is the same however many servers there are; requests are shared among them. */}}
{{- define "lossd.loadQuery" -}}
{{- $pods := printf "namespace=%q,pod=~%q" .Release.Namespace (printf "%s-.*" (include "lossd.fullname" .)) }}
{{- if eq .Values.autoscaling.metric "inFlight" -}}
sum(lossd_in_flight{ {{- $pods -}} })
{{- else -}}
{{- $queue := printf "%s,stage=\"queue\"" $pods -}}
sum(rate(lossd_stage_seconds_sum{ {{- $queue -}} }[2m])) / clamp_min(sum(rate(lossd_stage_seconds_count{ {{- $queue -}} }[2m])), 0.001)
{{- end }}
{{- end }}

{{- define "lossd.scaleBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - type: Percent
      value: 100
      periodSeconds: 60
    - type: Pods
      value: 2
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end }}
