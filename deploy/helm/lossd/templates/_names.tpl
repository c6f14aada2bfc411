{{/* Names and labels. */}}

{{- define "lossd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The release's name with the chart's, once. Short enough that `-headless` still makes a name. */}}
{{- define "lossd.fullname" -}}
{{- $name := include "lossd.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "lossd.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lossd.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* What selects the servers, and never changes. */}}
{{- define "lossd.selectorLabels" -}}
app.kubernetes.io/name: {{ include "lossd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: {{ .Values.mode }}
{{- end }}

{{- define "lossd.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: lossd
{{- end }}

{{- define "lossd.labels" -}}
{{ include "lossd.selectorLabels" . }}
{{ include "lossd.commonLabels" . }}
{{- end }}

{{- define "lossd.image" -}}
{{- $image := .Values.image }}
{{- $built := ternary (printf "%s-cuda" .Chart.AppVersion) .Chart.AppVersion (gt (int .Values.gpu.count) 0) }}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default $built $image.tag }}
{{- end }}
{{- end }}

{{/* The pod of `helm test`: of the release, but none of its servers. */}}
{{- define "lossd.testLabels" -}}
app.kubernetes.io/name: {{ include "lossd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end }}
