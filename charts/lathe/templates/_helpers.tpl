{{- define "lathe.labels" -}}
app.kubernetes.io/part-of: lathe
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
{{- define "lathe.selector" -}}
app.kubernetes.io/name: lathe-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "lathe.tag" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{/* Rules in every namespace that is looked after. */}}
{{- define "lathe.namespaceRules" -}}
# The kinds themselves: read, make the Model of a finished job, write status.
- apiGroups: [lathe.dev]
  resources: [models, finetunejobs, inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [lathe.dev]
  resources: [models]
  verbs: [create, patch]
- apiGroups: [lathe.dev]
  resources: [models/status, finetunejobs/status, inferenceservices/status]
  verbs: [patch, update]
# Children say who owns them and hold up their deletion (OwnerReferencesPermissionEnforcement).
- apiGroups: [lathe.dev]
  resources: [models/finalizers, finetunejobs/finalizers, inferenceservices/finalizers]
  verbs: [update]
# Inspection, dataset checks and training run as Jobs; suspend is a patch, TTL and replacement a deletion.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# Serving runs as a Deployment.
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
# Why a pod does not run, its address for the control channel, its last words.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# The contract of a pod.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# The endpoint of a service.
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
# The artefact volume, made on first need and never deleted; what a claim's access mode allows.
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create, patch]
# Replicas go one by one when nodes are drained.
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
# Who may talk to the pods.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
# What happened, for people.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
{{/* Rules on things without a namespace. */}}
{{- define "lathe.clusterRules" -}}
# Profiles: read them; apply the embedded catalogue with a field manager of its own.
- apiGroups: [lathe.dev]
  resources: [acceleratorprofiles]
  verbs: [get, list, watch, create, patch]
{{- if .Values.readNodes }}
# How many accelerators there are, and on which nodes.
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
{{- end }}
{{- end }}
