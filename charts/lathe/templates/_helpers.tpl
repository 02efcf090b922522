{{/* Which pods are the operator's; the policies of workers' pods name the first of them. */}}
{{- define "lathe.selector" -}}
app.kubernetes.io/name: lathe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "lathe.labels" -}}
{{ include "lathe.selector" . }}
{{ include "lathe.release" . }}
{{- end }}
{{/* Which pods are the gateway's. */}}
{{- define "lathe.gatewaySelector" -}}
app.kubernetes.io/name: lathe-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "lathe.gatewayLabels" -}}
{{ include "lathe.gatewaySelector" . }}
{{ include "lathe.release" . }}
{{- end }}
{{/* The clean-up is no operator: no worker lets it in, no Service leads to it. */}}
{{- define "lathe.cleanupLabels" -}}
app.kubernetes.io/name: lathe-cleanup
app.kubernetes.io/instance: {{ .Release.Name }}
{{ include "lathe.release" . }}
{{- end }}
{{- define "lathe.release" -}}
app.kubernetes.io/part-of: lathe
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
{{- define "lathe.image" -}}
{{ .root.Values.image.registry }}/{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{/* Labels as `key=value`, with commas. */}}
{{- define "lathe.pairs" -}}
{{- $pairs := list }}
{{- range $key, $value := . }}{{ $pairs = append $pairs (printf "%s=%s" $key $value) }}{{ end }}
{{- join "," $pairs }}
{{- end }}
{{/* What the `restricted` standard asks of a pod and of a container. */}}
{{- define "lathe.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "lathe.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
{{/* Port of the collector of traces: the one in its URL, or else its scheme's. The host ends a URL's authority, an IPv6 one in brackets. */}}
{{- define "lathe.otlpPort" -}}
{{- $url := urlParse .Values.tracing.endpoint }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- $port | default (eq $url.scheme "https" | ternary "443" "80") }}
{{- end }}
